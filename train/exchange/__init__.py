"""To and from other libraries: exports of trained SAEs, imports of published ones, the object that SAEBench takes."""
