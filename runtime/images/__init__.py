"""Pictures and masks read, images written."""
