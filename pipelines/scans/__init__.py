"""Reading scans: every format and container, checked before anything else sees them."""
