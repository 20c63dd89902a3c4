"""Pure functions on arrays: no state, no modules, no mesh but the one in the arrays' types."""
