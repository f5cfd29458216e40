"""A parity run as a report: JSON, HTML with charts, JUnit."""
