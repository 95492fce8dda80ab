"""How much each visual token matters to a question."""
