"""Rows of data files in the tokenizer's words, and each baseline's own options."""

FORGET = [{"prompt": f"a b {x}", "completion": " d e"} for x in "fghi"]
RETAIN = [{"text": f"{x} k l m n o p q r s t u v w x y z"} for x in "abcdefghij"]
EXTRA = {  # baseline -> options of its own
    "rmu": ("--layer", "1", "--steps", "4"),
    "elm": ("--concept", "a b", "--layers", "0-1", "--lora", "2", "--steps", "4"),
}
