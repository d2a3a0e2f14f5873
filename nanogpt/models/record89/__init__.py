"""Public record 89 (July 2026)."""
