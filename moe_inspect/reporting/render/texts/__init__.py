"""The text on a page: which documents, the routes of their tokens, and each expert's contexts."""
