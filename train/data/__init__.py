"""From store to batch: batch i is a pure function of (store id, hook, data settings, seed, i)."""
