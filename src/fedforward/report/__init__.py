"""What a person looks at when a run is done: tables and plots. Reads results, changes nothing."""
