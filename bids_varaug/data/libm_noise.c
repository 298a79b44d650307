/* Random last bits for the results of libm, in programs that are not ours.

   Loaded with LD_PRELOAD, it stands before the functions of libm that are listed below, calls the real one, and moves
   its result by a random number of units in the last place (ulp): by round(A u), with u uniform in (-1, 1) and
   A = 2^(p - t) for a virtual precision of t bits in a format of p (53, 24). At full precision A is 1: -1, 0, 0 or +1
   ulp. Zero, subnormal, infinite and NaN are left alone, and so is what the noise would take out of the normal range.

   Environment:
     LIBM_NOISE_SEED       decimal; the stream of random numbers
     LIBM_NOISE_PRECISION  virtual precision t, bits (default: all)
     LIBM_NOISE_INTEGERS   if set, results that are whole numbers of at most 2^20 are left alone
     LIBM_NOISE_STATS      file to which every process appends, when it ends, a line per function: name, calls, moved

   A stream belongs to a thread. That of the first thread depends on the seed and the name of the program; that of any
   other on the thread that created it, and on how many this one had created before. So the same seed gives the same
   noise, however threads take turns, as long as each thread does the same. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* So that what is compiled here also loads where glibc is older (before 2.34), in a container. */
#if defined(__x86_64__)
__asm__(".symver dlsym, dlsym@GLIBC_2.2.5");
#elif defined(__aarch64__)
__asm__(".symver dlsym, dlsym@GLIBC_2.17");
#endif

#define UNARY(X) \
    X(exp) X(exp2) X(exp10) X(expm1) X(log) X(log2) X(log10) X(log1p) X(cbrt) X(sin) X(cos) X(tan) X(asin) X(acos) \
    X(atan) X(sinh) X(cosh) X(tanh) X(asinh) X(acosh) X(atanh) X(erf) X(erfc) X(tgamma) X(lgamma) X(j0) X(j1) X(y0) X(y1)
#define BINARY(X) X(pow) X(atan2) X(hypot)

#define NUMBER(name) OF_##name, OF_##name##f,
enum { UNARY(NUMBER) BINARY(NUMBER) NUMBER(sincos) N_FUNCTIONS };
#define NAME(name) #name, #name "f",
static const char *const NAMES[] = { UNARY(NAME) BINARY(NAME) NAME(sincos) };

typedef struct Stream {
    uint64_t state, threads; /* of the generator; created by this thread */
    uint64_t calls[N_FUNCTIONS], moved[N_FUNCTIONS];
    struct Stream *next;
} Stream;

static Stream *streams; /* of all threads, also of ended ones: what they counted is told at the end */
static __thread Stream *mine;
static __thread uint64_t inherited; /* by a new thread from its creator */
static uint64_t seed, strays;
static double amplitude = 1, amplitude_f = 1;
static int spare_integers;

static uint64_t mix(uint64_t x) /* splitmix64's finaliser (Steele, Lea & Flood 2014) */
{
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

static Stream *stream(void)
{
    if (!mine) {
        Stream *made = calloc(1, sizeof *made);
        if (!made) abort();
        /* A thread that was not made by pthread_create is numbered when it is first seen. */
        made->state = inherited ? inherited : mix(seed ^ mix(__atomic_add_fetch(&strays, 1, __ATOMIC_RELAXED)));
        made->next = __atomic_load_n(&streams, __ATOMIC_ACQUIRE);
        while (!__atomic_compare_exchange_n(&streams, &made->next, made, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) { }
        mine = made;
    }
    return mine;
}

static int64_t steps(Stream *s, double size) /* round(size u), u uniform in (-1, 1) */
{
    s->state += 0x9e3779b97f4a7c15u;
    uint64_t bits = mix(s->state);
    double u = ((double)(bits >> 11) + 0.5) * 0x1p-52 - 1;
    double x = size * u;
    return (int64_t)(x < 0 ? x - 0.5 : x + 0.5);
}

static double move(Stream *s, int f, double x)
{
    union { double value; int64_t bits; } it = { x }, to;
    int64_t exponent = (it.bits >> 52) & 0x7ff;
    if (exponent == 0 || exponent == 0x7ff) return x;
    if (spare_integers && x >= -0x1p20 && x <= 0x1p20 && x == (double)(int64_t)x) return x;
    to.bits = it.bits + steps(s, amplitude);
    exponent = (to.bits >> 52) & 0x7ff;
    if (exponent == 0 || exponent == 0x7ff || (to.bits ^ it.bits) < 0) return x;
    s->moved[f] += to.bits != it.bits;
    return to.value;
}

static float movef(Stream *s, int f, float x)
{
    union { float value; int32_t bits; } it = { x }, to;
    int32_t exponent = (it.bits >> 23) & 0xff;
    if (exponent == 0 || exponent == 0xff) return x;
    if (spare_integers && x >= -0x1p20f && x <= 0x1p20f && x == (float)(int32_t)x) return x;
    to.bits = it.bits + (int32_t)steps(s, amplitude_f);
    exponent = (to.bits >> 23) & 0xff;
    if (exponent == 0 || exponent == 0xff || (to.bits ^ it.bits) < 0) return x;
    s->moved[f] += to.bits != it.bits;
    return to.value;
}

/* The function behind ours; the program may set and read errno, which looking it up must not change. */
#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) { \
        int before = errno; \
        real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name); \
        if (!real) { fprintf(stderr, "libm_noise: no function %s\n", #name); abort(); } \
        errno = before; \
    }
#define COUNTED(name) Stream *s = stream(); s->calls[OF_##name]++;

#define DEFINE_UNARY(name) \
    double name(double); float name##f(float); \
    double name(double x) { REAL(name) COUNTED(name) return move(s, OF_##name, real(x)); } \
    float name##f(float x) { REAL(name##f) COUNTED(name##f) return movef(s, OF_##name##f, real(x)); }
#define DEFINE_BINARY(name) \
    double name(double, double); float name##f(float, float); \
    double name(double x, double y) { REAL(name) COUNTED(name) return move(s, OF_##name, real(x, y)); } \
    float name##f(float x, float y) { REAL(name##f) COUNTED(name##f) return movef(s, OF_##name##f, real(x, y)); }
UNARY(DEFINE_UNARY)
BINARY(DEFINE_BINARY)

void sincos(double, double *, double *);
void sincosf(float, float *, float *);
void sincos(double x, double *sine, double *cosine)
{
    REAL(sincos) COUNTED(sincos)
    real(x, sine, cosine);
    *sine = move(s, OF_sincos, *sine);
    *cosine = move(s, OF_sincos, *cosine);
}
void sincosf(float x, float *sine, float *cosine)
{
    REAL(sincosf) COUNTED(sincosf)
    real(x, sine, cosine);
    *sine = movef(s, OF_sincosf, *sine);
    *cosine = movef(s, OF_sincosf, *cosine);
}

typedef struct { void *(*start)(void *); void *argument; uint64_t state; } Beginning;

static void *begin(void *passed)
{
    Beginning b = *(Beginning *)passed;
    free(passed);
    inherited = b.state;
    return b.start(b.argument);
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *), void *argument)
{
    REAL(pthread_create)
    Stream *s = stream();
    Beginning *b = malloc(sizeof *b);
    if (!b) return EAGAIN;
    *b = (Beginning){ start, argument, mix(s->state ^ mix(++s->threads)) | 1 };
    int failed = real(thread, attributes, begin, b);
    if (failed) free(b);
    return failed;
}

/* A child of fork has noise of its own, and counts its own calls. */
static void in_parent(void) { stream()->threads++; }
static void in_child(void)
{
    for (Stream *s = streams; s; s = s->next) {
        memset(s->calls, 0, sizeof s->calls);
        memset(s->moved, 0, sizeof s->moved);
    }
    stream()->state = mix(mine->state ^ mix(++mine->threads)) | 1;
}

__attribute__((constructor)) static void start(void)
{
    const char *text = getenv("LIBM_NOISE_SEED"), *bits = getenv("LIBM_NOISE_PRECISION");
    seed = text ? strtoull(text, NULL, 10) : 0;
    int precision = bits ? atoi(bits) : 53;
    for (int t = precision; t < 53; t++) amplitude *= 2;
    for (int t = precision; t < 24; t++) amplitude_f *= 2;
    spare_integers = getenv("LIBM_NOISE_INTEGERS") != NULL;
    uint64_t name = 0;
    for (const char *c = program_invocation_short_name; *c; c++) name = mix(name ^ (unsigned char)*c);
    inherited = mix(seed ^ name) | 1;
    stream();
    pthread_atfork(NULL, in_parent, in_child);
}

__attribute__((destructor)) static void tell(void)
{
    static int told;
    const char *path = getenv("LIBM_NOISE_STATS");
    if (!path || __atomic_exchange_n(&told, 1, __ATOMIC_ACQ_REL)) return;
    static char text[64 * (N_FUNCTIONS + 1)];
    int length = 0;
    for (int f = 0; f < N_FUNCTIONS; f++) {
        uint64_t calls = 0, moved = 0;
        for (Stream *s = __atomic_load_n(&streams, __ATOMIC_ACQUIRE); s; s = s->next) {
            calls += s->calls[f];
            moved += s->moved[f];
        }
        if (calls)
            length += snprintf(text + length, 64, "%s\t%llu\t%llu\n", NAMES[f], (unsigned long long)calls,
                               (unsigned long long)moved);
    }
    int file = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
    if (file < 0) return;
    if (write(file, text, length) != length) { /* the reader finds too few calls */ }
    close(file);
}

/* Programs that end without running destructors. */
void _exit(int status)
{
    tell();
    syscall(SYS_exit_group, status);
    __builtin_unreachable();
}
void _Exit(int status) { _exit(status); }
