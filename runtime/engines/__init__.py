"""The engines that execute a stage: one file for each, behind the protocol in protocol.py."""
