"""Constructor calls: each module makes the rooms of one concern, out of those that the modules below it made."""
