// C functions for ctypes: exceptions become a return value of 1 and emulation::error.
#pragma once

#include <exception>
#include <string>

namespace emulation {

inline std::string error;

template <class Body>
int guarded(const Body& body) {
    try {
        body();
        return 0;
    } catch (const std::exception& caught) {
        error = caught.what();
        return 1;
    }
}

}  // namespace emulation
