"""Tables and pages made from result files alone: nothing here loads a model, a store or weights."""
