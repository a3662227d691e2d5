"""The read model: views of submissions, steps and workers, folded from facts. For showing; decisions are the core's."""
