// The memory of a plan: blocks that live as long as it does, in huge pages where the system gives them.
#pragma once
#include <cstdint>
#include <memory>

namespace tmlc {

// Zeroed memory, 64-byte aligned; a large one begins on a huge page. Pages are first touched when the block is made, so
// that no call meets one that is not there yet.
class Block {
public:
    bool reserve(int64_t bytes);  // false when the system has no more
    uint8_t* data() const { return data_; }
    int64_t bytes() const { return bytes_; }

private:
    std::unique_ptr<uint8_t, void (*)(void*)> raw_{nullptr, nullptr};
    uint8_t* data_ = nullptr;
    int64_t bytes_ = 0;
};

}  // namespace tmlc
