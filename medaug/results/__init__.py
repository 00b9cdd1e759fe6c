"""The page of a result: one folder that says what was asked and what came out, written from rows alone."""
