"""From raw files to a catalogue, users' histories, splits and fixed candidates: readers, pure rules, an Arrow store."""
