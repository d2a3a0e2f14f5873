"""Public record 92 (September 2026)."""
