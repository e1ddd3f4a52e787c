<?php
// AsyncAws as people write it; nothing is configured but the region. When to ask and what to print is in README.md.

require "/usr/share/php/AsyncAws/Core/autoload.php";

use AsyncAws\Core\Configuration;
use AsyncAws\Core\Credentials\ChainProvider;
use AsyncAws\Core\Sts\StsClient;

$endpoint = getenv("STS_ENDPOINT") ?: null;
$region = getenv("AWS_REGION");

function tell(string $word, string $text): void
{
    echo $word, " ", trim(preg_replace("/\s+/", " ", $text)), "\n";
}

function describe(Throwable $error): string
{
    return get_class($error) . ": " . $error->getMessage();
}

function load(ChainProvider $chain, string $region): string
{
    $found = $chain->getCredentials(Configuration::create(["region" => $region]));
    return $found ? $found->getAccessKeyId() : throw new RuntimeException("no provider has credentials");
}

function identify(ChainProvider $chain, string $endpoint, string $region): void
{
    try {
        $sts = new StsClient(["endpoint" => $endpoint, "region" => $region], $chain);
        tell("identity", $sts->getCallerIdentity()->getArn());
    } catch (Throwable $error) {
        tell("identity-error", describe($error));
    }
}

// It does not tell its version; the list is made when the packages are unpacked.
function version(): string
{
    preg_match("/^php-async-aws-core_([^-]+)/m", file_get_contents("/usr/share/packages"), $found);
    return $found[1];
}

tell("version", version());
$watch = $argv[1] === "watch";
$chain = ChainProvider::createDefaultChain();
$last = null;
for ($left = $watch ? PHP_INT_MAX : (int) $argv[1]; $left > 0; $left--) {
    try {
        $start = hrtime(true);
        $key = load($chain, $region);
        $took = (hrtime(true) - $start) / 1e6;
        if (!$watch || $key !== $last) {
            tell("key", sprintf("%s %.1f", $key, $took));
            $endpoint && identify($chain, $endpoint, $region);
        }
        $last = $key;
    } catch (Throwable $error) {
        tell("error", describe($error));
        // It never looks again where it has found nothing, so that a program has to make another.
        $chain = ChainProvider::createDefaultChain();
    }
    if ($watch) {
        usleep(300_000);
    } else {
        $chain = ChainProvider::createDefaultChain();
    }
}
