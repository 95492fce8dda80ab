"""Public datasets of scans and questions, read from a user's own copy into our table of questions."""
