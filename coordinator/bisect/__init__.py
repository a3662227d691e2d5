"""Search for the commit that made a build bad: a pure strategy, and what it asks of git, the evaluator and the farm."""
