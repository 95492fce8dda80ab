"""Selection: the rows that each branch takes along after pruning."""
