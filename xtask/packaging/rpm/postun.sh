# What is changed in /etc, and the records in /var/log, stay, as is the custom of these packages.
[ "$1" -eq 0 ] || exit 0
rm -rf /run/metadata-proxy
# The package does not own its folders: cargo-generate-rpm puts none in.
rmdir --ignore-fail-on-non-empty /etc/metadata-proxy /usr/share/doc/metadata-proxy || :
if [ -d /run/systemd/system ]; then
	systemctl --quiet daemon-reload || :
fi
