"""What nodes wrote, on its way into the tables: how far a run has come, what is read, how it is cleaned."""
