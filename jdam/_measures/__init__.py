"""The kinds of measures a memory stores."""
