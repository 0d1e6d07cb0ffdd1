// load PORT STREAMS TOKENS ROUNDS: keep-alive streams of /v1/chat/completions; prints tokens/s, gaps, own CPU time.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + t.tv_nsec * 1e-9; }
static int order(const void *a, const void *b) { float x = *(float *)a, y = *(float *)b; return (x > y) - (x < y); }
typedef struct { int fd, done, events, length; double sent, last; char tail[8]; int rounds, id; } Stream;
static int port, streams, tokens, rounds, spread;
static char request[4096];
static float *gaps, *firsts; static long ngaps, nfirsts, total, reads, waits;
static unsigned seed = 1;
static void ask(Stream *s) {
  char body[2048], head[4096];
  int n = spread ? tokens - spread + (int)((s->id * 7919 + s->rounds * 104729) % (2 * spread + 1)) : tokens;
  s->length = n;
  int b = snprintf(body, sizeof body, "{\"model\":\"tiny\",\"messages\":[{\"role\":\"user\",\"content\":\"Say something, number %d of %d.\"}],"
    "\"stream\":true,\"temperature\":0,\"ignore_eos\":true,\"max_tokens\":%d}", s->id, s->rounds, n);
  int h = snprintf(head, sizeof head, "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s", b, body);
  if (write(s->fd, head, h) != h) { perror("write"); exit(1); }
  s->sent = now(); s->last = 0; s->events = 0;
}
int main(int argc, char **argv) {
  port = atoi(argv[1]); streams = atoi(argv[2]); tokens = atoi(argv[3]); rounds = atoi(argv[4]); spread = argc > 5 ? atoi(argv[5]) : 0;
  gaps = malloc(sizeof(float) * (long)streams * (rounds + 1) * (tokens + spread + 2)); firsts = malloc(sizeof(float) * streams * (rounds + 1));
  Stream *all = calloc(streams, sizeof *all);
  int ep = epoll_create1(0);
  for (int i = 0; i < streams; i++) {
    Stream *s = all + i; s->id = i; s->fd = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(port)}; a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (connect(s->fd, (void *)&a, sizeof a)) { perror("connect"); return 1; }
    int one = 1; setsockopt(s->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    fcntl(s->fd, F_SETFL, O_NONBLOCK);
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = s}; epoll_ctl(ep, EPOLL_CTL_ADD, s->fd, &e);
  }
  double start = now(); int left = streams;
  for (int i = 0; i < streams; i++) ask(all + i);
  static char buffer[1 << 20];
  double end = 0, full = 0; long at_full = 0;
  while (left) {
    struct epoll_event ready[64];
    int n = epoll_wait(ep, ready, 64, -1); waits++;
    for (int k = 0; k < n; k++) {
      Stream *s = ready[k].data.ptr;
      int got = read(s->fd, buffer, sizeof buffer); reads++;
      if (got <= 0) { if (got < 0 && errno == EAGAIN) continue; fprintf(stderr, "closed\n"); return 1; }
      double t = now();
      // Events begin with "data: {"; the role's, the tokens', the finish's; then [DONE] and the last chunk.
      char *p = buffer, *stop = buffer + got; int ended = 0;
      if (s->events == 0 && !strncmp(buffer, "HTTP/1.1 4", 10)) { fprintf(stderr, "%.*s\n", got, buffer); return 1; }
      while ((p = memmem(p, stop - p, "data: ", 6))) {
        p += 6;
        if (*p == '[') { ended = 1; break; }
        s->events++;
        if (s->events == 2) { firsts[nfirsts++] = t - s->sent; s->last = t; total++; }
        else if (s->events > 2 && s->events <= s->length + 1) { gaps[ngaps++] = t - s->last; s->last = t; total++; }
      }
      if (ended) {
        if (s->events != s->length + 2 && s->events != s->length + 1) { fprintf(stderr, "stream of %d events, not %d\n", s->events, s->length + 2); }
        s->rounds++;
        // The end of the body is the empty chunk.
        while (got < 5 || memcmp(buffer + got - 5, "0\r\n\r\n", 5)) { int m = read(s->fd, buffer, sizeof buffer); if (m > 0) got = m; else if (m == 0) return 1; }
        if (s->rounds < rounds) ask(s); else { left--; if (!full) { full = t; at_full = total; } end = t; }
      }
    }
  }
  struct rusage u; getrusage(RUSAGE_SELF, &u);
  double user = u.ru_utime.tv_sec + u.ru_utime.tv_usec * 1e-6, sys = u.ru_stime.tv_sec + u.ru_stime.tv_usec * 1e-6;
  qsort(gaps, ngaps, sizeof(float), order); qsort(firsts, nfirsts, sizeof(float), order);
  printf("%ld tokens in %.2f s: %.0f tokens/s (%.0f until the first stream ended) | gap ms p50 %.2f p90 %.2f p99 %.2f p99.9 %.2f max %.1f | first ms p50 %.1f p99 %.1f | client us a token: user %.2f sys %.2f, reads %.2f waits %.3f a token\n",
    total, end - start, total / (end - start), at_full / (full - start), gaps[ngaps / 2] * 1e3, gaps[(long)(ngaps * .9)] * 1e3, gaps[(long)(ngaps * .99)] * 1e3, gaps[(long)(ngaps * .999)] * 1e3, gaps[ngaps - 1] * 1e3,
    firsts[nfirsts / 2] * 1e3, firsts[(long)(nfirsts * .99)] * 1e3, user / total * 1e6, sys / total * 1e6, (double)reads / total, (double)waits / total);
}
