// SoftTriple between the matrix products on the CPU, compiled once for each instruction set.
#include "soft_triple/cpu_centers.h"
#include "soft_triple/cpu_scores.h"
