"""Functions on tensors, one file an op: schema, reference, autograd and the public function."""
