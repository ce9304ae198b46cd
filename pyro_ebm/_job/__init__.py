"""The parts of the main job: read a table, learn its energy, draw from it, report."""
