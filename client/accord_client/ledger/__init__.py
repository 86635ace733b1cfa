"""The privacy ledger of a site: an append-only chain of entries, what follows from it, limits, and receipts."""
