"""Two traces of which one holds counts only: the load of the experts side by side."""
