"""Methods that store numbers in fewer bits."""
