"""Other methods of unlearning, trained in one loop, each ending in an ``Update`` like K-FADE's."""
