"""An update in the formats of other libraries."""
