"""`fusenc profile`: how fast a model runs here, where its time goes, and what would help; docs/profiling.md."""
