// short_conv, listed in attention.cpp's table.
#pragma once
#include "op.h"

namespace tmlc {
const char* check_short_conv(const Call& c);
int run_short_conv(const RunArgs& a);
}  // namespace tmlc
