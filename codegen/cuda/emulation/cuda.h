/* Stands in for the header of this name: simt.h, which is always included first, has what kernels use of it. */
#pragma once
