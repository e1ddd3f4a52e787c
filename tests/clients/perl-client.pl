# Perl's VM::EC2 as people write it; nothing is configured but the region. When to ask and what to print is in README.md.

use strict;
use warnings;
use Time::HiRes qw(clock_gettime sleep CLOCK_MONOTONIC);
use VM::EC2;
use VM::EC2::Security::CredentialCache;

$| = 1;

sub report {
    my ($word, @text) = @_;
    print join(' ', $word, split(' ', "@text")), "\n";
}

sub identify {
    my $ec2 = VM::EC2->new(
        -security_token => VM::EC2::Security::CredentialCache->get,
        -endpoint       => $ENV{STS_ENDPOINT},
        -raise_error    => 1,
    );
    return ($ec2->call('GetCallerIdentity'))[0];
}

# STS is no service of EC2's, but spoken to the same way.
VM::EC2::Dispatch->register(GetCallerIdentity => sub { shift->{GetCallerIdentityResult}{Arn} });

report(version => VM::EC2->VERSION);
my $watch = $ARGV[0] eq 'watch';
my $left = $watch ? 9**9**9 : $ARGV[0];
my $last = '';
while ($left > 0) {
    my $start = clock_gettime(CLOCK_MONOTONIC);
    if (my $key = eval { VM::EC2::Security::CredentialCache->get->access_key_id }) {
        my $took = (clock_gettime(CLOCK_MONOTONIC) - $start) * 1000;
        if (!$watch || $key ne $last) {
            report(key => $key, sprintf('%.1f', $took));
            if ($ENV{STS_ENDPOINT}) {
                my $arn = eval { identify() };
                defined $arn ? report(identity => $arn) : report('identity-error' => $@);
            }
        }
        $last = $key;
    } else {
        report(error => $@);
    }
    if ($watch) { sleep 0.3 } else { $left-- }
}
