// The whole runtime as one object; compiled once, linked to every kernel, hidden inside each.
#include "block.cpp"
#include "counters.cpp"
#include "hooks.cpp"
#include "memory.cpp"
#include "numbers.cpp"
#include "tensor.cpp"
