// Sends the events of one step to many sockets, in one call that Python makes without its interpreter lock.

#include <sys/socket.h>

#include <cstdint>

// Sends the bytes up to ends[n] (from ends[n - 1], or 0) of `data` to handles[n], and sets sent[n] to how many its
// socket has taken: fewer where its buffer is full, none where it is closed. Never waits.
extern "C" void send_all(int64_t count, const int32_t* handles, const int64_t* ends, const char* data, int64_t* sent) {
  int64_t begin = 0;
  for (int64_t n = 0; n < count; ++n) {
    const ssize_t taken = send(handles[n], data + begin, ends[n] - begin, MSG_DONTWAIT | MSG_NOSIGNAL);
    sent[n] = taken < 0 ? 0 : taken;
    begin = ends[n];
  }
}
