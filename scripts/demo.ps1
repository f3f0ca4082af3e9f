# Play the seed document's walkthrough with Invoke-WebRequest (curl.exe -k where the certificate is
# self-signed) against the running clusters, and check every answer. What is not running is started first
# and stopped at the end. Exit code 1 at the first difference.
# usage: demo.ps1 [all|lock|queue|cache|secure]
. (Join-Path $PSScriptRoot 'lib.ps1')

$DeadlineSeconds = 20
$Answer = @{ Status = 0; Body = ''; Json = $null }
# In Windows PowerShell `curl` is an alias of Invoke-WebRequest; curl.exe is the real one (Windows 10 on).
$CurlName = 'curl'
if ($OnWindows) {
    $CurlName = 'curl.exe'
}

function Write-Heading {
    param([string]$Text)
    Write-Host ''
    Write-Host "== $Text"
}

function Write-Step {
    param([string]$Text)
    Write-Host ''
    Write-Host "-- $Text"
}

function Set-Answer {
    param([int]$Status, [string]$Body)
    $script:Answer.Status = $Status
    $script:Answer.Body = $Body
    $script:Answer.Json = $null
    if ($Body.StartsWith('{')) {
        $script:Answer.Json = $Body | ConvertFrom-Json
    }
}

# The body of a refused request: PowerShell 7 hands it over, Windows PowerShell sometimes only as a stream.
function Read-Refusal {
    param($Failure)
    if ($null -ne $Failure.ErrorDetails -and $Failure.ErrorDetails.Message) {
        return $Failure.ErrorDetails.Message
    }
    $response = $Failure.Exception.Response
    if ($null -eq $response.PSObject.Methods['GetResponseStream']) {
        return ''
    }
    $stream = $response.GetResponseStream()
    if ($stream.CanSeek) {
        $stream.Position = 0
    }
    $reader = New-Object System.IO.StreamReader($stream)
    return $reader.ReadToEnd()
}

# One request; the answer, refusals too, goes to $Answer.
function Send-Request {
    param([string]$Method, [string]$Uri, [string]$Body = '', [switch]$Quietly)
    $request = @{ Uri = $Uri; Method = $Method; UseBasicParsing = $true; TimeoutSec = 30 }
    $shown = "PS> Invoke-WebRequest -UseBasicParsing -Uri '$Uri'"
    if ($Body) {
        $request.ContentType = 'application/json'
        $request.Body = $Body
        $shown += " -Method $Method -ContentType 'application/json' -Body '$Body'"
    }
    if (-not $Quietly) {
        Write-Host $shown
    }
    try {
        $response = Invoke-WebRequest @request
        $content = $response.Content
        if ($content -is [byte[]]) {
            $content = [System.Text.Encoding]::UTF8.GetString($content)
        }
        Set-Answer -Status ([int]$response.StatusCode) -Body ([string]$content).Trim()
    }
    catch {
        $property = $_.Exception.PSObject.Properties['Response']
        if ($null -eq $property -or $null -eq $property.Value) {
            throw
        }
        Set-Answer -Status ([int]$property.Value.StatusCode) -Body ([string](Read-Refusal $_)).Trim()
    }
    if (-not $Quietly) {
        Write-Host "$($Answer.Status) $($Answer.Body)"
    }
}

# The same with curl: for -k, and for a redirect that must not be followed. The body goes through a file,
# because Windows PowerShell loses the double quotes in arguments of native commands.
function Send-Curl {
    param([string[]]$Words, [string]$Body = '')
    $shown = "PS> $CurlName $(($Words | ForEach-Object { if ($_ -match '[^\w./:=-]') { "'$_'" } else { $_ } }) -join ' ')"
    $all = @('-sS', '--noproxy', '*', '--max-time', '30', '-w', '\n%{http_code}') + $Words
    $file = ''
    if ($Body) {
        $shown += " -d '$Body'"
        $file = [System.IO.Path]::GetTempFileName()
        [System.IO.File]::WriteAllText($file, $Body)
        $all += @('--data-binary', "@$file")
    }
    Write-Host $shown
    try {
        $lines = @(& $CurlName @all)
        $code = $LASTEXITCODE
    }
    finally {
        if ($file) {
            Remove-Item -LiteralPath $file
        }
    }
    if ($code -ne 0) {
        throw "$CurlName got no answer (exit code $code)"
    }
    $text = @($lines | Select-Object -SkipLast 1) -join "`n"
    Set-Answer -Status ([int]$lines[-1]) -Body $text.Trim()
    Write-Host "$($Answer.Status) $($Answer.Body)"
}

function Send-Post {
    param([string]$Uri, [string]$Body)
    Send-Request -Method 'POST' -Uri $Uri -Body $Body
}

function Get-Compact {
    param($Value)
    # Windows PowerShell sometimes writes an array as {"value": [...], "Count": n}.
    if ($Value -is [array]) {
        return '[' + (@($Value | ForEach-Object { Get-Compact $_ }) -join ',') + ']'
    }
    return ConvertTo-Json -InputObject $Value -Compress -Depth 20
}

# The status, and every field named in $Fields with the same value.
function Confirm-Answer {
    param([int]$Status, [hashtable]$Fields = @{})
    $wanted = "$Status $(Get-Compact $Fields)"
    if ($Answer.Status -ne $Status) {
        throw "expected $wanted, got $($Answer.Status) $($Answer.Body)"
    }
    foreach ($name in $Fields.Keys) {
        $property = $null
        if ($null -ne $Answer.Json) {
            $property = $Answer.Json.PSObject.Properties[$name]
        }
        if ($null -eq $property -or (Get-Compact $property.Value) -cne (Get-Compact $Fields[$name])) {
            throw "expected $wanted, got $($Answer.Status) $($Answer.Body)"
        }
    }
}

# Byte for byte.
function Confirm-Exactly {
    param([int]$Status, [string]$Body)
    if ($Answer.Status -ne $Status -or $Answer.Body -cne $Body) {
        throw "expected exactly $Status $Body, got $($Answer.Status) $($Answer.Body)"
    }
}

# Something else that must hold of the answer.
function Confirm-That {
    param([bool]$Holds, [string]$What)
    if (-not $Holds) {
        throw "expected $What, got $($Answer.Status) $($Answer.Body)"
    }
}

# Poll a condition with a deadline.
function Wait-Until {
    param([scriptblock]$Condition, [string]$Otherwise)
    $giveUp = (Get-Date).AddSeconds($DeadlineSeconds)
    while (-not (& $Condition)) {
        if ((Get-Date) -gt $giveUp) {
            throw $Otherwise
        }
        Start-Sleep -Milliseconds 100
    }
}

# The live nodes of a service, in order: objects with Name, Url and Log.
function Get-Node {
    param([string]$Service)
    return @(Invoke-Nodes -Verb 'list' -Service $Service | ForEach-Object {
            $fields = $_ -split "`t"
            New-Object PSObject -Property @{ Name = $fields[1]; Url = $fields[2]; Log = $fields[3] }
        })
}

# --- A. lock -----------------------------------------------------------------------------------------

function Find-Leader {
    param($Nodes)
    $script:Leader = ''
    $script:Follower = ''
    foreach ($node in $Nodes) {
        Send-Request -Method 'GET' -Uri "$($node.Url)/status" -Quietly
        if ($Answer.Json.state -eq 'LEADER') {
            $script:Leader = $node.Url
        }
        else {
            $script:Follower = $node.Url
        }
    }
    return ($script:Leader -ne '') -and ($script:Follower -ne '')
}

function Test-WaitsForRight {
    Send-Request -Method 'GET' -Uri "$Leader/locks/demo-right" -Quietly
    return $Answer.Body -match '"waiters":\s*\[\s*\{[^]]*"client_id":\s*"klien-A"'
}

function Show-Lock {
    Write-Heading 'A. Distributed lock manager (Raft)'
    $nodes = @(Get-Node 'lock')
    Write-Step 'Find the leader: /status of each node'
    Wait-Until -Condition { Find-Leader $nodes } -Otherwise "no leader within $DeadlineSeconds s"
    Send-Request -Method 'GET' -Uri "$Leader/status"
    Confirm-Answer 200 @{ state = 'LEADER' }

    # What an interrupted demo left behind.
    foreach ($client in 'klien-A', 'klien-B') {
        foreach ($name in 'kunci-raft', 'demo-left', 'demo-right') {
            $body = '{"lock_name": "' + $name + '", "client_id": "' + $client + '"}'
            Send-Request -Method 'POST' -Uri "$Leader/release" -Body $body -Quietly
        }
    }

    Write-Step 'Acquire an exclusive lock, on the leader'
    Send-Post "$Leader/acquire" '{"lock_name": "kunci-raft", "lock_type": "exclusive", "client_id": "klien-A"}'
    Confirm-Answer 200 @{ status = 'acquired'; lock_name = 'kunci-raft'; lock_type = 'exclusive'; client_id = 'klien-A' }
    Confirm-That ($Answer.Json.fencing_token -gt 0) 'a fencing token'

    Write-Step 'Nobody else gets it (wait_ms 0: only try)'
    Send-Post "$Leader/acquire" '{"lock_name": "kunci-raft", "client_id": "klien-B", "wait_ms": 0}'
    Confirm-Answer 409 @{ error = 'Lock is held'; status = 'held' }

    Write-Step 'A follower says who leads (307; curl -L goes there by itself)'
    Send-Curl -Words @('-X', 'POST', "$Follower/release") -Body '{"lock_name": "kunci-raft", "client_id": "klien-A"}'
    Confirm-Answer 307 @{ error = 'Not the leader'; leader = $Leader }

    Write-Step 'Release'
    Send-Post "$Leader/release" '{"lock_name": "kunci-raft", "client_id": "klien-A"}'
    Confirm-Answer 200 @{ status = 'released' }

    Write-Step 'Deadlock: A holds left and wants right, B holds right and wants left'
    Send-Post "$Leader/acquire" '{"lock_name": "demo-left", "client_id": "klien-A"}'
    Confirm-Answer 200 @{ status = 'acquired' }
    Send-Post "$Leader/acquire" '{"lock_name": "demo-right", "client_id": "klien-B"}'
    Confirm-Answer 200 @{ status = 'acquired' }
    Write-Host "PS> Start-Job: the same for klien-A and demo-right (it waits, in the background)"
    $job = Start-Job -ArgumentList "$Leader/acquire" -ScriptBlock {
        param($Uri)
        $body = '{"lock_name": "demo-right", "client_id": "klien-A"}'
        $request = @{ Uri = $Uri; Method = 'POST'; ContentType = 'application/json'; Body = $body }
        (Invoke-WebRequest @request -UseBasicParsing -TimeoutSec 30).Content
    }
    try {
        Wait-Until -Condition { Test-WaitsForRight } -Otherwise 'klien-A does not wait for demo-right'
        Send-Post "$Leader/acquire" '{"lock_name": "demo-left", "client_id": "klien-B"}'
        Confirm-Answer 409 @{ error = 'Deadlock detected'; status = 'deadlock'; cycle = @('klien-B', 'klien-A') }

        Write-Step 'B gives way: A, who waited, gets the lock at once'
        Send-Post "$Leader/release" '{"lock_name": "demo-right", "client_id": "klien-B"}'
        Confirm-Answer 200 @{ status = 'released' }
        $waited = [string]($job | Wait-Job -Timeout $DeadlineSeconds | Receive-Job)
        Write-Host "  the waiting request was answered: $waited"
        Set-Answer -Status 200 -Body $waited
        Confirm-Answer 200 @{ status = 'acquired'; lock_name = 'demo-right'; client_id = 'klien-A' }
    }
    finally {
        Remove-Job -Job $job -Force
    }
    foreach ($name in 'demo-left', 'demo-right') {
        $body = '{"lock_name": "' + $name + '", "client_id": "klien-A"}'
        Send-Post "$Leader/release" $body
        Confirm-Answer 200 @{ status = 'released' }
    }
}

# --- B. queue ----------------------------------------------------------------------------------------

# Of the nodes, asked each for itself, one has the queue. Soon after a start it may be changing hands.
function Test-OneOwnerAnswers {
    param($Nodes)
    $owners = 0
    $others = 0
    foreach ($node in $Nodes) {
        Send-Request -Method 'GET' -Uri "$($node.Url)/consume?queue=nama-antrean&forward=false"
        if ($Answer.Status -eq 204) {
            $owners += 1
        }
        elseif ($Answer.Status -eq 421) {
            Confirm-Answer 421 @{ error = 'Wrong node' }
            Confirm-That ($Answer.Json.owner -match ':') "the owner's address" | Out-Null
            $others += 1
        }
    }
    if (($owners -eq 1) -and ($owners + $others -eq @($Nodes).Count)) {
        return $true
    }
    Write-Host '  (the queue is changing hands: once more)'
    return $false
}

function Show-Queue {
    Write-Heading 'B. Message queue (consistent hashing)'
    $nodes = @(Get-Node 'queue')
    $first = $nodes[0].Url
    $second = $nodes[1].Url
    Write-Step "Produce to any node; it forwards to the queue's owner"
    Send-Post "$first/produce" '{"queue": "nama-antrean", "body": "isi pesan baru"}'
    Confirm-Answer 201 @{ queue = 'nama-antrean'; status = 'created' }
    $produced = $Answer.Json.id

    Write-Step 'Consume, here through another node'
    Send-Request -Method 'GET' -Uri "$second/consume?queue=nama-antrean"
    Confirm-Answer 200 @{ queue = 'nama-antrean'; body = 'isi pesan baru' }
    $received = $Answer.Json.id
    while ($received -cne $produced) {
        Write-Host '  (an older message that nobody had acknowledged)'
        Send-Post "$second/ack" ('{"message_id": "' + $received + '"}')
        Confirm-Answer 200 @{ status = 'acknowledged' }
        Send-Request -Method 'GET' -Uri "$second/consume?queue=nama-antrean"
        Confirm-Answer 200 @{ body = 'isi pesan baru' }
        $received = $Answer.Json.id
    }

    Write-Step 'Acknowledge'
    Send-Post "$second/ack" ('{"message_id": "' + $received + '"}')
    Confirm-Answer 200 @{ status = 'acknowledged' }

    Write-Step 'With ?forward=false a node that does not own the queue names the owner'
    Wait-Until { Test-OneOwnerAnswers $nodes } 'expected one owner with an empty queue (204), 421 elsewhere'
}

# --- C. cache ----------------------------------------------------------------------------------------

function Get-Invalidation {
    param([string]$Log)
    return @(Select-String -LiteralPath $Log -Pattern 'INVALIDATE.*key=nama-kota')
}

function Show-Cache {
    Write-Heading 'C. Coherent cache (MESI)'
    $nodes = @(Get-Node 'cache')
    $first = $nodes[0].Url
    $second = $nodes[1].Url
    $log = $nodes[1].Log
    Write-Step 'Write on node A'
    Send-Post "$first/write" '{"key": "nama-kota", "value": "Balikpapan"}'
    Confirm-Answer 200 @{ status = 'ok'; key = 'nama-kota'; value = 'Balikpapan'; state = 'M' }

    Write-Step 'Read on node A: a hit'
    Send-Request -Method 'GET' -Uri "$first/read?key=nama-kota"
    Confirm-Answer 200 @{ key = 'nama-kota'; value = 'Balikpapan'; hit = $true; source = 'cache' }

    Write-Step 'Read on node B: a miss, fetched and kept'
    Send-Request -Method 'GET' -Uri "$second/read?key=nama-kota"
    Confirm-Answer 200 @{ value = 'Balikpapan'; state = 'S'; hit = $false; source = 'memory' }
    Send-Request -Method 'GET' -Uri "$second/read?key=nama-kota"
    Confirm-Answer 200 @{ value = 'Balikpapan'; state = 'S'; hit = $true; source = 'cache' }

    Write-Step "Update on node A: node B's copy is invalidated before the answer (see its log)"
    $before = @(Get-Invalidation $log).Count
    Send-Post "$first/write" '{"key": "nama-kota", "value": "Samarinda"}'
    Confirm-Answer 200 @{ status = 'ok'; value = 'Samarinda'; state = 'M' }
    Wait-Until -Condition { @(Get-Invalidation $log).Count -gt $before } -Otherwise "no INVALIDATE line for nama-kota in $log"
    Write-Host (@(Get-Invalidation $log)[-1].Line)
    Send-Request -Method 'GET' -Uri "$second/read?key=nama-kota"
    Confirm-Answer 200 @{ value = 'Samarinda'; hit = $false }

    Write-Step 'Metrics of node B'
    Send-Request -Method 'GET' -Uri "$second/metrics"
    Confirm-Answer 200
    $seen = $Answer.Json
    Confirm-That ($seen.hits -ge 1 -and $seen.misses -ge 2 -and $seen.invalidations_received -ge 1) 'hits, misses and an invalidation'
}

# --- D. secure ---------------------------------------------------------------------------------------

function Show-Secure {
    Write-Heading 'D. Secure key-value store (TLS, roles, audit)'
    $nodes = @(Get-Node 'secure')
    $first = $nodes[0].Url
    $second = $nodes[1].Url
    # The seed's public demo tokens: the node takes them on loopback only.
    $user = 'Authorization: Bearer token-user-ABC'
    $admin = 'Authorization: Bearer token-admin-123'
    $type = 'Content-Type: application/json'
    Write-Step 'Without a token'
    Send-Curl -Words @('-k', "$first/get?key=kunci1")
    Confirm-Exactly 401 '{"error":"Authorization token required or invalid"}'

    Write-Step 'Role user may not write'
    Send-Curl -Words @('-k', '-X', 'POST', '-H', $user, '-H', $type, "$first/set") -Body '{"key": "kunci1", "value": "gagal"}'
    Confirm-Exactly 403 '{"error":"Insufficient permissions"}'

    Write-Step 'Role admin may'
    Send-Curl -Words @('-k', '-X', 'POST', '-H', $admin, '-H', $type, "$first/set") -Body '{"key": "kunci1", "value": "berhasil"}'
    Confirm-Exactly 200 '{"status":"ok","key":"kunci1","value":"berhasil"}'

    Write-Step 'It is on node B as well'
    Send-Curl -Words @('-k', '-H', $user, "$second/get?key=kunci1")
    Confirm-Exactly 200 '{"key":"kunci1","value":"berhasil"}'
}

# --- play --------------------------------------------------------------------------------------------

$service = Get-ServiceArgument -Script 'demo.ps1' -Words $args
Initialize-Environment -Files $ServiceRequirements
$played = @($service)
if ($service -eq 'all') {
    $played = $ServiceNames
}
$borrowed = @($played | Where-Object { @(Get-Node $_).Count -eq 0 })
if ($borrowed.Count -gt 0) {
    Write-Host "Not running, so started for the demo: $borrowed"
}
$code = 0
try {
    $started = @(Invoke-Nodes -Verb 'start' -Service $service)
    if ($LASTEXITCODE -ne 0) {
        $started | ForEach-Object { Write-Host $_ }
        throw 'the clusters did not start'
    }
    foreach ($each in $played) {
        & "Show-$each"
    }
    Write-Host ''
    Write-Host "Every answer was as expected: $played"
}
catch {
    [Console]::Error.WriteLine("error: $($_.Exception.Message)")
    $code = 1
}
finally {
    # The services that were not running before are stopped again, whatever happens.
    foreach ($each in $borrowed) {
        Invoke-Nodes -Verb 'stop' -Service $each | ForEach-Object { Write-Host $_ }
    }
}
exit $code
