"""The operators: one file each, with its definition, dispatch, autograd and public function."""
