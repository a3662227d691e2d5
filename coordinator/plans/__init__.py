"""Plans of wish lists: what each package and system could be fetched from or would be built as, and nothing done."""
