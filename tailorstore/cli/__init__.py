"""The shell: commands that parse their arguments, call the store, and print a table or JSON. No logic lives here."""
