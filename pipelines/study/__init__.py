"""The study: token policies trained side by side, and the evidence on whether and where they look."""
