// What adbd takes from Android's system services, where there are none: it knows no key, so whoever must be authorised is not.
#include <adbd_auth.h>
#include <crypto_utils/android_pubkey.h>
#include <sys/types.h>
#include <unistd.h>

extern "C" {
AdbdAuthContext* adbd_auth_new(AdbdAuthCallbacks*) { return nullptr; }
void adbd_auth_delete(AdbdAuthContext*) {}
void adbd_auth_run(AdbdAuthContext*) {
  for (;;) pause();
}
void adbd_auth_get_public_keys(AdbdAuthContext*, bool (*)(const char*, size_t, void*), void*) {}
uint64_t adbd_auth_notify_auth(AdbdAuthContext*, const char*, size_t) { return 0; }
void adbd_auth_notify_disconnect(AdbdAuthContext*, uint64_t) {}
void adbd_auth_prompt_user(AdbdAuthContext*, const char*, size_t, void*) {}
bool adbd_auth_supports_feature(AdbdAuthFeature) { return false; }
bool android_pubkey_decode(const uint8_t*, size_t, RSA**) { return false; }
void fs_config(const char*, int, const char*, unsigned*, unsigned*, unsigned*, uint64_t*) {}
}
