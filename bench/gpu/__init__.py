"""`make gpu`: everything that only a GPU can show, in a few minutes and in order of value; docs/gpu.md says how."""
