// SoftTriple between the matrix products on the CPU, compiled once for each instruction set.
#include "common/cpu_matrix.h"
#include "common/cpu_products.h"
#include "soft_triple/cpu_centers.h"
#include "soft_triple/cpu_scores.h"
