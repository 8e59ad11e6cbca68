/* Preloaded: counts the allocations that come from the kernel library, by the address they are called from.
 *
 * malloc and its kin are called by the C++ runtime for `new`, so the operators are counted too: their callers are in the
 * library. `alloc_watch` sets the library's range of addresses, `alloc_counted` tells and zeroes the count. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

static atomic_uintptr_t low, high;
static atomic_long counted;

void alloc_watch(uintptr_t from, uintptr_t to) {
    atomic_store(&low, from);
    atomic_store(&high, to);
}
long alloc_counted(void) { return atomic_exchange(&counted, 0); }

static void saw(void* caller) {
    const uintptr_t at = (uintptr_t)caller;
    if (at >= atomic_load(&low) && at < atomic_load(&high)) atomic_fetch_add(&counted, 1);
}
#define SAW() saw(__builtin_return_address(0))

extern void* __libc_malloc(size_t);
extern void* __libc_calloc(size_t, size_t);
extern void* __libc_realloc(void*, size_t);
extern void* __libc_memalign(size_t, size_t);

void* malloc(size_t n) { SAW(); return __libc_malloc(n); }
void* calloc(size_t n, size_t size) { SAW(); return __libc_calloc(n, size); }
void* realloc(void* p, size_t n) { SAW(); return __libc_realloc(p, n); }
void* memalign(size_t a, size_t n) { SAW(); return __libc_memalign(a, n); }
void* aligned_alloc(size_t a, size_t n) { SAW(); return __libc_memalign(a, n); }
int posix_memalign(void** p, size_t a, size_t n) { SAW(); return (*p = __libc_memalign(a, n)) == NULL; }

/* operator new and new[]: plain, and with an alignment. */
static void* made(void* p) { if (p == NULL) abort(); return p; }
void* _Znwm(size_t n) { SAW(); return made(__libc_malloc(n)); }
void* _Znam(size_t n) { SAW(); return made(__libc_malloc(n)); }
void* _ZnwmSt11align_val_t(size_t n, size_t a) { SAW(); return made(__libc_memalign(a, n)); }
void* _ZnamSt11align_val_t(size_t n, size_t a) { SAW(); return made(__libc_memalign(a, n)); }
