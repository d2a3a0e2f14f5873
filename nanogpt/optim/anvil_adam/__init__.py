"""ANVIL on banks of matrices, Adam on everything else, tables of rows on a cadence of their own."""
