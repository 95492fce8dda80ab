"""PhantomVQA: a benchmark of which everything is known - where each finding lies, and what the right answer is."""
