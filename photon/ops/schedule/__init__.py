"""Which visual tokens a question keeps, from their scores."""
