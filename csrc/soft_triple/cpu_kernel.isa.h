// SoftTriple between the matrix products on the CPU, compiled once for each instruction set.
#include "common/cpu_matrix.isa.h"
#include "common/cpu_products.isa.h"
#include "common/exp.isa.h"
#include "soft_triple/cpu_centers.isa.h"
#include "soft_triple/cpu_scores.isa.h"
